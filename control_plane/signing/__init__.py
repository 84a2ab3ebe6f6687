"""The two TUF repositories and the process that holds their online keys."""
