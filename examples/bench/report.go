package main

import (
	"crypto/sha512"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
)

// size is a report size, with a report of that size.
type size struct {
	name     string
	document []byte
	real     bool
}

// wantedSizes are the sizes to measure. For the first two, real reports are used if available.
var wantedSizes = []struct {
	name  string
	bytes int
	real  string
}{
	{"15 KB", 15_000, "informational.json"},
	{"41 KB", 41_000, "no_threat.json"},
	{"220 KB", 220_000, ""},
	{"2 MiB", 2 << 20, ""},
}

func sizes(folder string) ([]size, error) {
	var all []size
	for _, want := range wantedSizes {
		s := size{name: want.name}
		if want.real != "" {
			document, err := os.ReadFile(filepath.Join(folder, want.real))
			if err != nil && !errors.Is(err, fs.ErrNotExist) {
				return nil, err
			}
			s.document, s.real = document, err == nil
		}
		if !s.real {
			s.document = makeReport(want.bytes)
		}
		all = append(all, s)
	}
	return all, nil
}

// id returns the size for use in task IDs and file names.
func (s size) id() string { return strings.ReplaceAll(s.name, " ", "") }

// makeReport generates a finished report of about the given size. It has the structure of a real report and compresses
// about as well: the names repeat, and the digests and IDs between them do not.
func makeReport(bytes int) []byte {
	var b strings.Builder
	b.WriteString(`{"processTime":2238,"result":{"finalVerdict":{"verdict":"NO_THREAT","threatLevel":0.1,"confidence":1},` +
		`"taskReference":{"name":"transform-file","additionalInfo":{"submitName":"file.png","submitTime":1723037247064,` +
		digest + strings.Repeat("0", 64) + `"}},` +
		`"ID":"37c43f9c-79c3-440e-9ac5-7279695d0c9a","state":"SUCCESS","opcount":1,"processTime":2238},` +
		`"subtaskReferences":[{"name":"osint","additionalInfo":"FILE_HASH_SHA256","ID":"8c9e1e3e-8811-433a-87af-b41ea96f3e0d",` +
		`"state":"SUCCESS","opcount":2,"processTime":1018}],"resources":{`)
	for i := 0; b.Len() < bytes-500; i++ {
		sum := sha512.Sum512(fmt.Append(nil, i))
		digest := sha512.Sum512(sum[:])
		more := sha512.Sum512(digest[:])
		if i > 0 {
			b.WriteByte(',')
		}
		fmt.Fprintf(&b, `"%x-%x-%x":{"results":[{"verdict":"NO_THREAT","tags":[],"digests":{"SHA-512":"%x","SHA-256":"%x","MD5":"%x","SHA-384":"%x"},"scanners":[{"name":"engine-%d",`+
			`"result":"clean","detail":null}]}],"relatedTaskType":"OSINT_EXTENDED","origin":{"type":"URL","data":{"offset":%d}},`+
			`"resourceReference":{"type":"HASH","name":"osint","ID":"%x"},"mediaType":{"string":"application/octet-stream","number":%d},`+
			`"signalGroupsByID":{},"signalGroups":[],"allTags":[],"originVerdicts":[],"verdict":{"verdict":"UNKNOWN","threatLevel":0,`+
			`"confidence":1},"notifications":[],"additionalTasks":[{"name":"osint","state":"IN_PROGRESS","resourceReference":null}]}`,
			sum[:4], sum[4:6], sum[6:12], digest, sum[12:44], sum[44:60], more[:48], i%17, i*37, digest[:12], i%91)
	}
	b.WriteString(`},"filesDownloadFinished":true,"additionalStepsDone":true}}`)
	return []byte(b.String())
}
