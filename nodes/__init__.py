"""The nodes: sockets, widgets, validation and one call into a method."""
