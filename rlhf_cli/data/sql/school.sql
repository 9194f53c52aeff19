CREATE TABLE teachers (teacher_id INTEGER PRIMARY KEY, name TEXT, subject TEXT, salary INTEGER);
CREATE TABLE courses (course_id INTEGER PRIMARY KEY, title TEXT, teacher_id INTEGER REFERENCES teachers, credits INTEGER);
CREATE TABLE students (student_id INTEGER PRIMARY KEY, name TEXT, year INTEGER, city TEXT);
CREATE TABLE grades (student_id INTEGER REFERENCES students, course_id INTEGER REFERENCES courses, grade REAL);
INSERT INTO teachers VALUES (1,'Novak','mathematics',4200),(2,'Osei','physics',3900),(3,'Petrov','history',3600),(4,'Quinn','biology',4100),(5,'Rossi','mathematics',4600);
INSERT INTO courses VALUES (1,'Algebra',1,6),(2,'Geometry',5,4),(3,'Mechanics',2,6),(4,'Optics',2,3),(5,'Ancient Rome',3,4),(6,'Genetics',4,5),(7,'Statistics',5,6),(8,'Ecology',4,3);
INSERT INTO students VALUES (1,'Aylin',1,'Graz'),(2,'Bruno',1,'Linz'),(3,'Carla',2,'Graz'),(4,'David',2,'Wien'),(5,'Elena',3,'Wien'),(6,'Farid',3,'Graz'),(7,'Greta',3,'Linz');
INSERT INTO grades VALUES (1,1,2.0),(1,5,1.5),(2,1,4.0),(2,3,3.0),(3,1,1.0),(3,2,2.0),(3,6,1.5),(4,3,2.5),(4,4,3.5),(4,7,2.0),
 (5,6,1.0),(5,7,1.5),(5,8,2.0),(6,2,5.0),(6,7,4.0),(6,5,2.5),(1,3,2.5);
