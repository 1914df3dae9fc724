// Package backend is a small broker and processor node for trying the module out: it speaks the Task API as nodes and
// brokers do, and really looks into the files it is given. It keeps everything in memory and is no malware analysis.
package backend

import (
	"bytes"
	"crypto/md5"  //nolint:gosec // reports name files by it, as everybody does
	"crypto/sha1" //nolint:gosec // likewise
	"crypto/sha256"
	"crypto/sha512"
	"encoding/hex"
	"math"
	"net/http"
	"net/url"
	"regexp"
	"slices"
	"unicode/utf16"
)

// Analysis is what can be told from the bytes of a file alone.
type Analysis struct {
	FileSize   int               `json:"fileSize"`
	Digests    map[string]string `json:"digests"` // in hex, by the name of the hash
	MediaType  string            `json:"mediaType"`
	Entropy    float64           `json:"entropy"` // in bits per byte, 0 to 8
	Executable *Executable       `json:"executable,omitempty"`
	Strings    []string          `json:"strings"`
	URLs       []string          `json:"extractedUrls"`
	Domains    []string          `json:"extractedDomains"`
}

// The bounds of what is listed, so that no file makes a report without end.
const (
	maxStrings      = 2000
	maxStringLength = 256
	maxURLs         = 200
	minStringLength = 6
)

// Analyse looks into a file. It never fails: what cannot be read is left out.
func Analyse(file []byte) *Analysis {
	texts := findStrings(file)
	urls, domains := findURLs(texts)
	a := &Analysis{
		FileSize:   len(file),
		Digests:    digests(file),
		MediaType:  http.DetectContentType(file),
		Entropy:    entropy(file),
		Executable: readExecutable(file),
		Strings:    texts,
		URLs:       urls,
		Domains:    domains,
	}
	if a.Executable != nil {
		a.MediaType = a.Executable.mediaType
	}
	return a
}

func digests(file []byte) map[string]string {
	m, s1 := md5.Sum(file), sha1.Sum(file) //nolint:gosec // see the imports
	s256, s512 := sha256.Sum256(file), sha512.Sum512(file)
	return map[string]string{
		"MD5":     hex.EncodeToString(m[:]),
		"SHA-1":   hex.EncodeToString(s1[:]),
		"SHA-256": hex.EncodeToString(s256[:]),
		"SHA-512": hex.EncodeToString(s512[:]),
	}
}

// entropy is Shannon's, of the bytes: near 8 for what is compressed or encrypted.
func entropy(data []byte) float64 {
	if len(data) == 0 {
		return 0
	}
	var counts [256]int
	for _, b := range data {
		counts[b]++
	}
	var bits float64
	for _, n := range counts {
		if n > 0 {
			p := float64(n) / float64(len(data))
			bits -= p * math.Log2(p)
		}
	}
	return math.Round(bits*1000) / 1000
}

// findStrings lists the printable strings in a file, in ASCII and in UTF-16LE as Windows has them, each once.
func findStrings(file []byte) []string {
	found := []string{}
	seen := make(map[string]bool)
	add := func(s string) bool {
		s = s[:min(len(s), maxStringLength)]
		if !seen[s] {
			seen[s] = true
			found = append(found, s)
		}
		return len(found) < maxStrings
	}
	for run := range bytes.FieldsFuncSeq(file, func(r rune) bool { return !printable(r) }) {
		if len(run) >= minStringLength && !add(string(run)) {
			return found
		}
	}
	var wide []uint16
	for i := 0; i+1 < len(file); {
		if c := uint16(file[i]) | uint16(file[i+1])<<8; printable(rune(c)) {
			wide = append(wide, c)
			i += 2
			continue
		}
		if len(wide) >= minStringLength && !add(string(utf16.Decode(wide))) {
			return found
		}
		wide = wide[:0]
		i++
	}
	if len(wide) >= minStringLength {
		add(string(utf16.Decode(wide)))
	}
	return found
}

func printable(c rune) bool { return c >= ' ' && c <= '~' }

var urlPattern = regexp.MustCompile(`(?i)\b(?:https?|ftp)://[a-z0-9.-]+(?::[0-9]+)?(?:/[^\s"'<>\\^{|}` + "`" + `]*)?`)

// findURLs lists the URLs in strings, and the hosts they name.
func findURLs(texts []string) (urls, domains []string) {
	urls, domains = []string{}, []string{}
	for _, text := range texts {
		for _, candidate := range urlPattern.FindAllString(text, maxURLs) {
			u, err := url.Parse(candidate)
			if err != nil || u.Hostname() == "" || slices.Contains(urls, candidate) {
				continue
			}
			urls = append(urls, candidate)
			if !slices.Contains(domains, u.Hostname()) {
				domains = append(domains, u.Hostname())
			}
			if len(urls) == maxURLs {
				return urls, domains
			}
		}
	}
	return urls, domains
}
