"""Speed and memory of Scalable Forward-Forward against backpropagation: ``python -m ff_lightning.benchmark``.

variants.py   what is measured: one step of each way to train, or to predict
measure.py    how: time in alternation, memory and operations by exact counting, each variant in its own process
report.py     the table, and the plot of memory over a step
__main__.py   the command
"""
