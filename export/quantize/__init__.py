"""Eight bits: what the stages see on real clips, what rounding it costs, which layers stay in float, and the graphs of it.

`clips` brings driven clips, `samples` records the inputs of every stage while the fp32 pipeline generates them, `recipe` makes
scales and SmoothQuant's factors of them, `insert` and `layout` write the graphs, `sensitivity` says what each layer costs, `mix`
chooses what stays in float, `gate` measures the result against fp32 and, where there is one, the truth.
"""
