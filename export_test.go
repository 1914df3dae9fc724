package fsbroker

// StoreUsers tells how many handlers use the store that all share.
func StoreUsers() int {
	n, _ := stores.References(storeKey)
	return n
}
