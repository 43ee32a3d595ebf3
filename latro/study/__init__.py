"""`latro study`: methods, tasks and seeds compared on tiny models that are made here."""
