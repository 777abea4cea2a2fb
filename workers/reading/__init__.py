"""Reading experts into slots: the lanes, their C core, and how the pager sees them."""
