CREATE TABLE authors (author_id INTEGER PRIMARY KEY, name TEXT, country TEXT, born INTEGER);
CREATE TABLE books (book_id INTEGER PRIMARY KEY, title TEXT, author_id INTEGER REFERENCES authors, year INTEGER, pages INTEGER, genre TEXT);
CREATE TABLE members (member_id INTEGER PRIMARY KEY, name TEXT, joined TEXT);
CREATE TABLE loans (loan_id INTEGER PRIMARY KEY, book_id INTEGER REFERENCES books, member_id INTEGER REFERENCES members, taken TEXT, returned TEXT);
INSERT INTO authors VALUES (1,'Mara Lindqvist','Sweden',1951),(2,'Tomas Reyes','Chile',1968),(3,'Ines Okafor','Nigeria',1979),
 (4,'Paul Haas','Germany',1939),(5,'Yuki Arai','Japan',1985),(6,'Lena Brandt','Germany',1972);
INSERT INTO books VALUES (1,'The Salt Road',1,1988,312,'novel'),(2,'Winter Ports',1,1995,268,'novel'),(3,'A Map of Rain',2,2004,198,'poetry'),
 (4,'Copper Sky',2,2011,420,'novel'),(5,'The Third Well',3,2015,356,'novel'),(6,'Letters to Lagos',3,2019,144,'essay'),
 (7,'On Measuring',4,1975,510,'essay'),(8,'Clocks and Rivers',4,1982,233,'essay'),(9,'Paper Foxes',5,2017,188,'poetry'),
 (10,'Night Signal',5,2021,401,'thriller'),(11,'Nine Doors',6,2008,377,'thriller'),(12,'The Quiet Engine',6,2014,295,'novel');
INSERT INTO members VALUES (1,'Anna','2019-03-01'),(2,'Boris','2020-07-15'),(3,'Chandra','2021-01-20'),(4,'Dario','2021-11-02'),
 (5,'Elif','2022-05-30'),(6,'Femi','2023-02-11');
INSERT INTO loans VALUES (1,1,1,'2022-01-05','2022-01-20'),(2,4,1,'2022-02-01','2022-03-10'),(3,10,2,'2022-02-14','2022-02-28'),
 (4,10,3,'2022-03-03','2022-03-17'),(5,5,3,'2022-04-01',NULL),(6,9,4,'2022-04-12','2022-04-20'),(7,11,2,'2022-05-02','2022-05-21'),
 (8,1,5,'2022-06-06','2022-06-30'),(9,12,5,'2022-07-07',NULL),(10,10,1,'2022-08-15','2022-09-01'),(11,3,4,'2022-09-09','2022-09-15'),
 (12,7,2,'2022-10-10',NULL),(13,5,1,'2023-01-08','2023-01-29'),(14,6,6,'2023-03-01','2023-03-04');
