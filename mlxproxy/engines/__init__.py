"""What mlxproxy knows of each kind of backend, a folder for each."""
