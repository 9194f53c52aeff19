CREATE TABLE airports (code TEXT PRIMARY KEY, city TEXT, country TEXT, runways INTEGER);
CREATE TABLE airlines (airline_id INTEGER PRIMARY KEY, name TEXT, founded INTEGER);
CREATE TABLE flights (flight_id INTEGER PRIMARY KEY, airline_id INTEGER REFERENCES airlines, origin TEXT REFERENCES airports, destination TEXT REFERENCES airports, day TEXT, minutes INTEGER, delay INTEGER);
CREATE TABLE bookings (flight_id INTEGER REFERENCES flights, passenger TEXT, fare REAL);
INSERT INTO airports VALUES ('ARN','Stockholm','Sweden',3),('BER','Berlin','Germany',2),('CDG','Paris','France',4),('DUB','Dublin','Ireland',2),('FCO','Rome','Italy',4),('MUC','Munich','Germany',2),('ZRH','Zurich','Switzerland',3);
INSERT INTO airlines VALUES (1,'Aeris',1987),(2,'Borealis',2003),(3,'Cirrus',1965),(4,'Dune',2019);
INSERT INTO flights VALUES (1,1,'BER','CDG','2024-03-01',105,0),(2,1,'CDG','FCO','2024-03-01',125,35),(3,2,'ARN','BER','2024-03-01',100,5),
 (4,2,'BER','ARN','2024-03-02',105,0),(5,3,'MUC','DUB','2024-03-02',150,60),(6,3,'DUB','MUC','2024-03-03',145,10),(7,3,'ZRH','CDG','2024-03-03',75,0),
 (8,1,'FCO','MUC','2024-03-04',95,20),(9,2,'ARN','ZRH','2024-03-04',160,0),(10,3,'CDG','DUB','2024-03-05',110,90),(11,1,'MUC','BER','2024-03-05',65,15);
INSERT INTO bookings VALUES (1,'Ito',89.0),(1,'Jansen',120.0),(2,'Ito',99.0),(3,'Kim',75.0),(4,'Kim',80.0),(5,'Lopez',210.0),(5,'Mbeki',180.0),
 (5,'Ito',195.0),(7,'Jansen',60.0),(8,'Nilsen',110.0),(9,'Kim',140.0),(10,'Lopez',130.0),(10,'Jansen',150.0),(11,'Mbeki',55.0);
