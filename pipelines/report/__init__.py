"""One page that a person looks at: what a run folder holds, in a file that needs no network."""

# The page, in the run folder.
PAGE = "report.html"
