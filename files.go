package fsbroker

import (
	"container/heap"
	"crypto/sha256"

	"github.com/caddy-fsbroker/caddy-fsbroker/internal/task"
)

// fileIndex finds the newest report of a file. The zero value is empty. It is not safe for use by several goroutines.
type fileIndex struct{ byFile map[fileID]fileReports }

// fileReport is a report under its key, with its place in the index.
type fileReport struct {
	key    task.Key
	report *task.Report
	all    bool  // it is the complete report
	place  int32 // in its fileReports, counted from 1; 0 if it is in no index
	at     int64 // its time there, in Unix nanoseconds. That of the report may change under another key.
}

// fileID is the beginning of the SHA-256 sum of a file. Its last bit says whether the reports are complete. A whole sum would
// double the cost of an entry.
type fileID [16]byte

func newFileID(sum [sha256.Size]byte, all bool) fileID {
	id := fileID(sum[:len(fileID{})])
	id[len(id)-1] &^= 1
	if all {
		id[len(id)-1] |= 1
	}
	return id
}

// newest returns the newest report of a file, high-level or complete, or nil.
func (x *fileIndex) newest(sum [sha256.Size]byte, all bool) *fileReport {
	reports := x.byFile[newFileID(sum, all)]
	if len(reports) == 0 || reports[0].report.File() != sum {
		return nil
	}
	return reports[0]
}

// add adds a report, unless it is in the index already, or does not say which file it is of.
func (x *fileIndex) add(r *fileReport) {
	sum := r.report.File()
	if r.place != 0 || sum == [sha256.Size]byte{} {
		return
	}
	if x.byFile == nil {
		x.byFile = make(map[fileID]fileReports)
	}
	r.at = r.report.At().UnixNano()
	id := newFileID(sum, r.all)
	reports := x.byFile[id]
	heap.Push(&reports, r)
	x.byFile[id] = reports
}

// renew moves a report to its place after its time has changed.
func (x *fileIndex) renew(r *fileReport) {
	if r.place == 0 {
		return
	}
	r.at = r.report.At().UnixNano()
	reports := x.byFile[newFileID(r.report.File(), r.all)]
	heap.Fix(&reports, int(r.place)-1)
}

// remove removes a report, if it is in the index.
func (x *fileIndex) remove(r *fileReport) {
	if r.place == 0 {
		return
	}
	id := newFileID(r.report.File(), r.all)
	reports := x.byFile[id]
	heap.Remove(&reports, int(r.place)-1)
	if len(reports) == 0 {
		delete(x.byFile, id)
		return
	}
	x.byFile[id] = reports
}

// fileReports are the reports of a file, the newest in front. It implements heap.Interface.
type fileReports []*fileReport

func (f fileReports) Len() int           { return len(f) }
func (f fileReports) Less(i, j int) bool { return f[i].at > f[j].at }
func (f fileReports) Swap(i, j int) {
	f[i], f[j] = f[j], f[i]
	f[i].place, f[j].place = int32(i+1), int32(j+1) //nolint:gosec // memory has no room for that many
}

func (f *fileReports) Push(r any) {
	*f = append(*f, r.(*fileReport))
	r.(*fileReport).place = int32(len(*f)) //nolint:gosec // memory has no room for that many
}

func (f *fileReports) Pop() any {
	last := len(*f) - 1
	r := (*f)[last]
	(*f)[last] = nil
	*f = (*f)[:last]
	r.place = 0
	return r
}
