//! The cluster's CA, certificates of members and agents, and the TLS configurations made from them.
