"""The report: one document, drawn as a page, as Markdown and in a terminal."""
