// Package backend is a small broker and processor node for trying the module out. It speaks the Task API as the
// product's brokers and nodes do, in the variations that their documentation leaves open, and really analyses the files
// it gets. It keeps everything in memory, and is no malware analysis.
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
	"net/netip"
	"net/url"
	"regexp"
	"slices"
	"strings"
)

// Analysis is what can be told from the bytes of a file alone.
type Analysis struct {
	FileSize   int               `json:"fileSize"`
	Digests    map[string]string `json:"digests"` // in hex, by the name of the hash
	MediaType  MediaType         `json:"mediaType"`
	Entropy    float64           `json:"entropy"` // in bits per byte, 0 to 8
	Executable *Executable       `json:"executable,omitempty"`
	Strings    []string          `json:"strings"`
	URLs       []string          `json:"extractedUrls"`
	Domains    []string          `json:"extractedDomains"`
	IPs        []string          `json:"extractedIPs"` // or what looks like one: a version can
	Emails     []string          `json:"extractedEmails"`
}

// MediaType is a media type, and where its parts end.
type MediaType struct {
	String    string `json:"string"`
	Slash     int    `json:"slash"`
	Semicolon int    `json:"semicolon"` // its length, where there is none
}

// The bounds of what is listed, so that no file makes a report without end.
const (
	maxStrings      = 2000
	maxStringLength = 256
	maxFound        = 200 // URLs, and each other kind of what is found in strings
	minStringLength = 6
)

// Analyse looks into a file. It never fails: what cannot be read is left out.
func Analyse(file []byte) *Analysis {
	texts := findStrings(file)
	urls, emails := findAll(texts, urlPattern, isURL), findAll(texts, emailPattern, nil)
	exe := readExecutable(file)
	return &Analysis{
		FileSize:   len(file),
		Digests:    digests(file),
		MediaType:  mediaType(file, exe),
		Entropy:    entropy(file),
		Executable: exe,
		Strings:    texts,
		URLs:       urls,
		Domains:    domains(urls, emails),
		IPs:        findAll(texts, ipPattern, isIP),
		Emails:     emails,
	}
}

// mediaType is what browsers would take a file for, unless its headers say more.
func mediaType(file []byte, exe *Executable) MediaType {
	name := http.DetectContentType(file)
	if exe != nil {
		name = exe.mediaType
	}
	typeOnly, _, _ := strings.Cut(name, ";")
	return MediaType{String: name, Slash: strings.Index(name, "/"), Semicolon: len(typeOnly)}
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
		if !seen[s] {
			seen[s] = true
			found = append(found, s)
		}
		return len(found) < maxStrings
	}
	for run := range bytes.FieldsFuncSeq(file, func(r rune) bool { return !printable(r) }) {
		if len(run) >= minStringLength && !add(string(run[:min(len(run), maxStringLength)])) {
			return found
		}
	}
	var wide []byte
	for i := 0; i < len(file); {
		if i+1 < len(file) && file[i+1] == 0 && printable(rune(file[i])) {
			wide = append(wide, file[i])
			i += 2
			continue
		}
		if len(wide) >= minStringLength && !add(string(wide[:min(len(wide), maxStringLength)])) {
			return found
		}
		wide = wide[:0]
		i++
	}
	if len(wide) >= minStringLength {
		add(string(wide[:min(len(wide), maxStringLength)]))
	}
	return found
}

func printable(c rune) bool { return c >= ' ' && c <= '~' }

var (
	urlPattern   = regexp.MustCompile(`(?i)\b(?:https?|ftp)://[a-z0-9.-]+(?::[0-9]+)?(?:/[^\s"'<>\\^{|}` + "`" + `]*)?`)
	emailPattern = regexp.MustCompile(`(?i)\b[a-z0-9._%+-]+@[a-z0-9-]+(?:\.[a-z0-9-]+)*\.[a-z]{2,}\b`)
	ipPattern    = regexp.MustCompile(`\b[0-9]{1,3}(?:\.[0-9]{1,3}){3}\b`)
)

func isURL(text string) bool {
	u, err := url.Parse(text)
	return err == nil && u.Hostname() != ""
}

func isIP(text string) bool {
	_, err := netip.ParseAddr(text)
	return err == nil
}

// findAll lists what matches a pattern in strings, each once, and what else is wanted of it.
func findAll(texts []string, pattern *regexp.Regexp, wanted func(string) bool) []string {
	found := []string{}
	for _, text := range texts {
		for _, match := range pattern.FindAllString(text, maxFound) {
			if slices.Contains(found, match) || wanted != nil && !wanted(match) {
				continue
			}
			if found = append(found, match); len(found) == maxFound {
				return found
			}
		}
	}
	return found
}

// domains lists the hosts that URLs and email addresses name, other than by a number.
func domains(urls, emails []string) []string {
	found := []string{}
	add := func(host string) {
		if host = strings.ToLower(host); len(found) < maxFound && !isIP(host) && !slices.Contains(found, host) {
			found = append(found, host)
		}
	}
	for _, text := range urls {
		if u, err := url.Parse(text); err == nil {
			add(u.Hostname())
		}
	}
	for _, email := range emails {
		_, host, _ := strings.Cut(email, "@")
		add(host)
	}
	return found
}
