"""Reports that people read: run folders, compared as console, Markdown, LaTeX, CSV and one HTML page."""
