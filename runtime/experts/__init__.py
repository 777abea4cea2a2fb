"""The expert cache on its own, for engines that compute themselves: several processes share one, any may be killed."""
