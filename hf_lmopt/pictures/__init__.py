"""
How figures over the steps of a run become pictures: [`Series`], themes, lines and heat maps.

What a picture shows is said by those who draw it: callbacks, the range test, the report. Needs matplotlib, which the
extra `recipes` brings, when something is drawn. Figures have a canvas of their own: no window, and nothing of
pyplot's global state.
"""
