"""What the processes say to each other, a module for each pair. Token ids travel packed (int32, little-endian), never
as lists.
"""
