"""Jobs for tests: started under a named launcher as a user starts them, waited for with a bound, and looked at."""
