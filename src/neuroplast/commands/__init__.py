"""The commands of the command line: they parse, call the front door, and print."""
