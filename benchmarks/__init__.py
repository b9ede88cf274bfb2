"""streamkeep beside the bare loop that does the same work, in the same run. See README.md."""
