"""Optional integrations, one file each. Importing one without the extra that it needs fails with a sentence that names the extra."""
