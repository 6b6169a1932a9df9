from atoll.rounds import *  # temporary
