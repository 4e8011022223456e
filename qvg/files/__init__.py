"""Names, places and content of files: nothing is lost, and nothing that is read is believed unchecked."""
