"""`temper advise`: how to adapt a model to a task: measured where data and a model are given, else from the literature. Floor 8.

`command` reads and asks, `trial` measures the rivals and what training costs here, `advice` turns answers and figures into
recommendations with their reasons, `show` writes them for people.
"""
