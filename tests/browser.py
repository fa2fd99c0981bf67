from vlwb.bench.browser import *      # moved to vlwb.bench.browser; this line goes when no test imports it
