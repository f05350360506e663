"""`interlace sweep`: which learning rate is best, and does it stay the best when the model grows?

`request` reads what was asked for, `trials` turns it into recipes with a digest each, `search`
decides which of them are needed next, `store` keeps what came out of them. `running` trains one,
`workers` many in processes of this machine, `ray_tune` under Ray. `progress`, `picture`, `records`
and `page` show it, `carry` writes the winner into another recipe; `interlace.trainer.mup.transfer`
holds the verdict.
"""
