package examples_test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io/fs"
	"net/url"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"unicode"

	"github.com/yuin/goldmark"
	"github.com/yuin/goldmark/ast"
	"github.com/yuin/goldmark/extension"
	"github.com/yuin/goldmark/text"

	"github.com/caddyserver/caddy/v2/caddyconfig"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"
)

// repository is where GitHub shows the files of this repository.
const repository = "https://github.com/caddy-fsbroker/caddy-fsbroker/blob/main/"

// page is a Markdown file.
type page struct {
	links   []string
	anchors map[string]bool
	blocks  []codeBlock
}

// codeBlock is a fenced code block.
type codeBlock struct {
	line     int // of its first line, in the file
	language string
	code     []byte
}

// repositoryFiles returns the paths of all files of the repository: those that git knows, or without git those in the
// folder. The paths have slashes.
var repositoryFiles = sync.OnceValues(func() ([]string, error) {
	command := exec.Command("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard")
	command.Dir = ".."
	if output, err := command.Output(); err == nil && len(output) > 0 {
		return strings.Split(strings.TrimSuffix(string(output), "\x00"), "\x00"), nil
	}
	var files []string
	err := fs.WalkDir(os.DirFS(".."), ".", func(name string, entry fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case entry.IsDir() && (entry.Name() == ".git" || entry.Name() == "node_modules"):
			return fs.SkipDir
		case !entry.IsDir():
			files = append(files, name)
		}
		return nil
	})
	return files, err
})

// pages returns all Markdown files of the repository, by their paths.
func pages(t *testing.T) map[string]*page {
	t.Helper()
	files, err := repositoryFiles()
	if err != nil {
		t.Fatal(err)
	}
	found := make(map[string]*page)
	for _, name := range files {
		if path.Ext(name) != ".md" {
			continue
		}
		if source, err := os.ReadFile(filepath.Join("..", name)); err == nil { // git also knows files that are deleted
			found[name] = parsePage(source)
		}
	}
	for _, name := range []string{"README.md", "docs/API.md", "examples/production/README.md"} {
		if found[name] == nil {
			t.Fatalf("%s was not found", name)
		}
	}
	return found
}

// htmlAnchor matches an anchor in HTML.
var htmlAnchor = regexp.MustCompile(`<a (?:id|name)="([^"]+)"`)

func parsePage(source []byte) *page {
	p := &page{anchors: make(map[string]bool)}
	repeated := make(map[string]int)
	document := goldmark.New(goldmark.WithExtensions(extension.GFM)).Parser().Parse(text.NewReader(source))
	_ = ast.Walk(document, func(node ast.Node, entering bool) (ast.WalkStatus, error) { // the function returns no error
		if !entering {
			return ast.WalkContinue, nil
		}
		switch n := node.(type) {
		case *ast.Heading:
			anchor := headingAnchor(textOf(n, source))
			count := repeated[anchor]
			if repeated[anchor]++; count > 0 {
				anchor = fmt.Sprintf("%s-%d", anchor, count)
			}
			p.anchors[anchor] = true
		case *ast.Link:
			p.links = append(p.links, string(n.Destination))
		case *ast.Image:
			p.links = append(p.links, string(n.Destination))
		case *ast.AutoLink:
			p.links = append(p.links, string(n.URL(source)))
		case *ast.RawHTML:
			p.addAnchors(n.Segments.Value(source))
		case *ast.HTMLBlock:
			p.addAnchors(n.Lines().Value(source))
		case *ast.FencedCodeBlock:
			block := codeBlock{language: string(n.Language(source)), code: n.Lines().Value(source)}
			if n.Lines().Len() > 0 {
				block.line = 1 + bytes.Count(source[:n.Lines().At(0).Start], []byte("\n"))
			}
			p.blocks = append(p.blocks, block)
		}
		return ast.WalkContinue, nil
	})
	return p
}

func (p *page) addAnchors(html []byte) {
	for _, match := range htmlAnchor.FindAllSubmatch(html, -1) {
		p.anchors[string(match[1])] = true
	}
}

// textOf returns what a reader sees of a node.
func textOf(node ast.Node, source []byte) string {
	var seen strings.Builder
	_ = ast.Walk(node, func(n ast.Node, entering bool) (ast.WalkStatus, error) { // the function returns no error
		if t, ok := n.(*ast.Text); ok && entering {
			seen.Write(t.Segment.Value(source))
		}
		return ast.WalkContinue, nil
	})
	return seen.String()
}

// headingAnchor returns the anchor that GitHub makes of a heading.
func headingAnchor(heading string) string {
	return strings.Map(func(r rune) rune {
		switch {
		case r == ' ':
			return '-'
		case r == '-', r == '_', unicode.IsLetter(r), unicode.IsNumber(r), unicode.IsMark(r):
			return unicode.ToLower(r)
		}
		return -1
	}, strings.TrimSpace(heading))
}

func TestHeadingAnchors(t *testing.T) {
	p := parsePage([]byte("# The `fsbroker_task` directive\n## It's A_B, C & D: 1.2\n## [Try](x) *it* – now\n## Try it\n## Try it\n```\n# no\n```\n<a id=\"x\"></a>\n"))
	want := []string{"its-a_b-c--d-12", "the-fsbroker_task-directive", "try-it", "try-it--now", "try-it-1", "x"}
	got := slices.Collect(func(yield func(string) bool) {
		for anchor := range p.anchors {
			if !yield(anchor) {
				return
			}
		}
	})
	slices.Sort(got)
	if !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
}

// repositoryLink matches a link to a file of this repository on GitHub, in text that is not Markdown.
var repositoryLink = regexp.MustCompile(regexp.QuoteMeta(repository) + `[\w./-]+(?:#[\w-]+)?`)

// TestLinks follows every link in the repository that leads to a file of it, and to an anchor there.
func TestLinks(t *testing.T) {
	files, err := repositoryFiles()
	if err != nil {
		t.Fatal(err)
	}
	exists := map[string]bool{".": true}
	for _, name := range files {
		for ; !exists[name]; name = path.Dir(name) {
			exists[name] = true
		}
	}
	found := pages(t)
	followed := 0
	follow := func(from, link string) {
		target, anchor, err := resolve(from, link)
		switch {
		case err != nil:
			t.Errorf("%s: the link %s: %v", from, link, err)
		case target == "":
			return // it leads out of the repository
		case !exists[target]:
			t.Errorf("%s: the link %s leads to %s, which there is not", from, link, target)
		case anchor == "":
		case found[target] == nil:
			t.Errorf("%s: the link %s has an anchor, but does not lead to a page", from, link)
		case !found[target].anchors[anchor]:
			t.Errorf("%s: the link %s leads to an anchor that there is not", from, link)
		}
		followed++
	}
	for name, p := range found {
		for _, link := range p.links {
			follow(name, link)
		}
	}
	for _, name := range files {
		if ext := path.Ext(name); ext != ".go" && ext != ".yaml" && ext != ".json" {
			continue
		}
		source, err := os.ReadFile(filepath.Join("..", name))
		if err != nil {
			continue // git also knows files that are deleted
		}
		for _, link := range repositoryLink.FindAllString(string(source), -1) {
			follow(name, link)
		}
	}
	if followed < 100 {
		t.Errorf("there were only %d links", followed)
	}
}

// resolve returns the file or folder that a link leads to, and the anchor. The file is empty if the link leads out of the
// repository.
func resolve(from, link string) (target, anchor string, err error) {
	if inside, ok := strings.CutPrefix(link, repository); ok {
		from, link = "README.md", inside
	}
	u, err := url.Parse(link)
	if err != nil || u.IsAbs() || u.Host != "" {
		return "", "", err
	}
	if u.Path == "" {
		return from, u.Fragment, nil
	}
	return path.Join(path.Dir(from), u.Path), u.Fragment, nil
}

// contexts are the blocks around a part of a Caddyfile, by the first word of the part.
var contexts = map[string]string{
	"@internal":      "example.com {\n%s\n}",
	"fsbroker_task":  "example.com {\n%s\n}",
	"broker":         "example.com {\nfsbroker_task {\nsecret client secret\n%s\n}\n}",
	"transport":      "example.com {\nfsbroker_task {\nsecret client secret\nbroker https://localhost:23001\n%s\n}\n}",
	"cache":          "example.com {\nfsbroker_task {\nsecret client secret\nbroker https://localhost:23001\n%s\n}\n}",
	"encryption_key": "example.com {\nfsbroker_task {\nsecret client secret\nbroker https://localhost:23001\ncache {\nstorage file_system reports\n%s\n}\n}\n}",
	"format":         "example.com {\nlog {\n%s\n}\n}",
}

// TestCaddyfilesInPages adapts the Caddyfiles and the parts of Caddyfiles in all pages, and checks how they are formatted.
func TestCaddyfilesInPages(t *testing.T) {
	adapter := caddyconfig.GetAdapter("caddyfile")
	adapted := 0
	for name, p := range pages(t) {
		for _, block := range p.blocks {
			if block.language != "caddyfile" {
				continue
			}
			adapted++
			place := fmt.Sprintf("%s:%d", name, block.line)
			if formatted := caddyfile.Format(block.code); !bytes.Equal(bytes.TrimSpace(formatted), bytes.TrimSpace(block.code)) {
				t.Errorf("%s: caddy fmt makes this of it:\n%s", place, formatted)
			}
			whole := block.code
			if first, _, _ := strings.Cut(string(block.code), " "); contexts[first] != "" {
				whole = fmt.Appendf(nil, contexts[first], block.code)
			}
			if _, _, err := adapter.Adapt(whole, map[string]any{"filename": "Caddyfile"}); err != nil {
				t.Errorf("%s: %v", place, err)
			}
		}
	}
	if adapted < 15 {
		t.Errorf("there were only %d", adapted)
	}
}

func TestJSONInPages(t *testing.T) {
	for name, p := range pages(t) {
		for _, block := range p.blocks {
			if block.language == "json" && !json.Valid(block.code) {
				t.Errorf("%s:%d is not valid", name, block.line)
			}
		}
	}
}
