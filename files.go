package fsbroker

import (
	"crypto/sha256"

	"github.com/caddy-fsbroker/caddy-fsbroker/internal/task"
)

// fileIndex finds the newest report of a file. The zero value is empty. It is not safe for use by several goroutines.
//
// Most files have one report. The index has only the beginning of the file's sum for it, because a list for each file would
// be a good part of what an entry costs. Files with several reports, or with a sum that begins like that of another file,
// have a list.
type fileIndex struct {
	single map[filePrefix]*entry
	lists  map[fileReports]*ranking // by time, the newest in front
}

// fileReports are the reports of a file that have one kind.
type fileReports struct {
	sum  [sha256.Size]byte
	kind task.Kind
}

// filePrefix is the beginning of a fileReports. Its last bit says whether they are complete.
type filePrefix [8]byte

func (f fileReports) prefix() filePrefix {
	p := filePrefix(f.sum[:])
	p[len(p)-1] &^= 1
	if f.kind == task.Complete {
		p[len(p)-1] |= 1
	}
	return p
}

func fileReportsOf(e *entry) fileReports { return fileReports{e.report.File(), e.kind} }

// age ranks the newest report first.
func age(e *entry) int64 { return -e.report.At().UnixNano() }

// newest returns the newest of the reports, or nil.
func (x *fileIndex) newest(f fileReports) *entry {
	if list, ok := x.lists[f]; ok {
		return list.first()
	}
	if e, ok := x.single[f.prefix()]; ok && fileReportsOf(e) == f {
		return e
	}
	return nil
}

// add adds a report, unless it is in the index already, or does not say which file it is of.
func (x *fileIndex) add(e *entry) {
	f := fileReportsOf(e)
	if e.filePlace != 0 || f.sum == [sha256.Size]byte{} {
		return
	}
	if x.single == nil {
		x.single, x.lists = make(map[filePrefix]*entry), make(map[fileReports]*ranking)
	}
	if list, ok := x.lists[f]; ok {
		list.set(e, age(e))
		return
	}
	other, ok := x.single[f.prefix()]
	if !ok {
		x.single[f.prefix()], e.filePlace = e, 1
		return
	}
	list := &ranking{place: func(e *entry) *place { return &e.filePlace }}
	x.lists[f] = list
	if fileReportsOf(other) == f {
		delete(x.single, f.prefix())
		other.filePlace = 0
		list.set(other, age(other))
	}
	list.set(e, age(e))
}

// renew moves a report to its place after its time has changed.
func (x *fileIndex) renew(e *entry) {
	if list, ok := x.lists[fileReportsOf(e)]; ok && e.filePlace != 0 {
		list.set(e, age(e))
	}
}

// remove removes a report, if it is in the index.
func (x *fileIndex) remove(e *entry) {
	if e.filePlace == 0 {
		return
	}
	f := fileReportsOf(e)
	list, ok := x.lists[f]
	if !ok {
		delete(x.single, f.prefix())
		e.filePlace = 0
		return
	}
	list.remove(e)
	if list.first() == nil {
		delete(x.lists, f)
	}
}
