"""What both ends of a connection share: sessions, execution, errors as status, settings."""
