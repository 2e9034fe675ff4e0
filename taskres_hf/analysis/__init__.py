"""Before and after training: how hard a task is, what a residual learned, how many pictures, and which to label next."""
