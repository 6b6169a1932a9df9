"""An experiment over real sites: what the processes do that run an author's code.

prepare  an experiment as the process and the plan of a run, or why it cannot be one
runner   the process of a run at the server: `net.service` over an author's experiment
worker   the process of a run at a site: trains on the site's own data
survey   what a table's columns mean, agreed by statistics of the sites before the first round
"""
