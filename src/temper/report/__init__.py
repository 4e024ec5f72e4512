"""What a run did, for people and programs: report.html and report.json, a summary, compare and chat in the terminal. Floor 7."""
