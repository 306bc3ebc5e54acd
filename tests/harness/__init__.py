"""What the tests share: XML seen by a second parser, servers, clients, vectors."""
