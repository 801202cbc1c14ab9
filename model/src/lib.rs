//! Ids, resources, commands, events and the rules over them: plain data, no I/O, no clock.
