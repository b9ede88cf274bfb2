"""Optional integrations, one file each. Importing one without its extra fails with a sentence that names the extra."""
