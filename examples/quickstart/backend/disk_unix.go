//go:build linux || darwin || freebsd

package backend

import (
	"os"
	"syscall"
)

// freeDiscSpace returns the free space for temporary files in MiB. It reports false if that is not known.
func freeDiscSpace() (mib uint64, ok bool) {
	var stat syscall.Statfs_t
	if err := syscall.Statfs(os.TempDir(), &stat); err != nil {
		return 0, false
	}
	//nolint:gosec,unconvert // the types differ between systems, and neither number is negative
	return uint64(stat.Bavail) * uint64(stat.Bsize) >> 20, true
}
