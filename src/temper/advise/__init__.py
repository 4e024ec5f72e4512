"""`temper advise`: how to adapt a model to a task: measured where data and a model are given, else from the literature. Floor 8.

`command` reads and asks; `trial` runs the `rivals` and their `training` and measures what that costs here; `advice` turns answers and
figures into recommendations with their reasons; `show` writes them for people.
"""
