"""The page's sections: each one function from ``Shown`` to ``Section``.

To add one: write such a function from the blocks of ``report.blocks``, and name it in ``page.SECTIONS`` where it
should stand. HTML, Markdown and the list of sections follow.
"""
