"""What the nodes of a cluster share. One node alone is a cluster of one: the tables are the same."""
