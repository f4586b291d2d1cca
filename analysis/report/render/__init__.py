"""From a document to a page, a Markdown file and figures: nothing here knows what a study is."""
