"""The scheduler's side: which pages a request holds, and whether it can be served."""
