"""Pages for people, as Markdown and as one HTML file: what the report and the comparison of methods are shown with.

``blocks`` and ``tables`` are what a page can hold, ``page`` is a whole one, ``wording`` turns figures into text,
``svg`` and ``axes`` draw. ``render_html`` and ``render_markdown`` make the files; every text is made ``visible`` and
escaped there. What is told of a run or of a comparison is not known here.
"""
