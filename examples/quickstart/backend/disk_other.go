//go:build !linux && !darwin && !freebsd

package backend

// freeDiscSpace reports false, since the standard library does not tell the free space of this system.
func freeDiscSpace() (mib uint64, ok bool) { return 0, false }
