"""`interlace bench longctx`: what a long context costs, for models side by side.

`contenders` makes models that can be compared, `measuring` times and weighs them, `operators` tells
where the time goes, `comparison` says from which length on one is faster, `table` and `picture`
show it all.
"""
