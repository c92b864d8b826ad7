"""From an SLO to confirmed engine limits in few starts: levels of load on one start, then starts that confirm."""
