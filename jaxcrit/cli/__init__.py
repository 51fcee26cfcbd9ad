"""The jaxcrit command."""
