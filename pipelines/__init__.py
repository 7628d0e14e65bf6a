"""Where pixels and codes meet: files, jobs and the command line."""
