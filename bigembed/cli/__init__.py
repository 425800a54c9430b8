"""The command line: main.py puts the commands together, the other files hold them."""
