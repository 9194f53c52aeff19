CREATE TABLE customers (customer_id INTEGER PRIMARY KEY, name TEXT, city TEXT);
CREATE TABLE products (product_id INTEGER PRIMARY KEY, name TEXT, category TEXT, price REAL, stock INTEGER);
CREATE TABLE orders (order_id INTEGER PRIMARY KEY, customer_id INTEGER REFERENCES customers, day TEXT, status TEXT);
CREATE TABLE lines (order_id INTEGER REFERENCES orders, product_id INTEGER REFERENCES products, quantity INTEGER);
INSERT INTO customers VALUES (1,'Adler','Bern'),(2,'Bianchi','Milan'),(3,'Costa','Porto'),(4,'Dubois','Lyon'),(5,'Eriksen','Oslo'),(6,'Ferrari','Milan');
INSERT INTO products VALUES (1,'kettle','kitchen',39.5,12),(2,'pan','kitchen',24.0,30),(3,'lamp','home',59.9,7),(4,'rug','home',120.0,3),
 (5,'drill','tools',89.0,9),(6,'saw','tools',19.5,25),(7,'hammer','tools',14.0,40),(8,'vase','home',34.0,0),(9,'knife','kitchen',48.0,18);
INSERT INTO orders VALUES (1,1,'2023-01-10','sent'),(2,2,'2023-01-12','sent'),(3,1,'2023-02-03','cancelled'),(4,3,'2023-02-14','sent'),
 (5,4,'2023-03-01','open'),(6,2,'2023-03-05','sent'),(7,5,'2023-03-20','open'),(8,1,'2023-04-02','sent'),(9,3,'2023-04-18','cancelled'),(10,4,'2023-05-06','sent');
INSERT INTO lines VALUES (1,1,1),(1,2,2),(2,3,1),(3,4,1),(4,5,1),(4,6,2),(4,7,1),(5,9,3),(6,2,1),(6,1,1),(7,3,2),(8,4,1),(8,9,1),(9,5,2),(10,7,4),(10,6,1);
