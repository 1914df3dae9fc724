package backend

import (
	"bytes"
	"debug/elf"
	"debug/macho"
	"debug/pe"
	"fmt"
	"io"
)

// Executable is what the headers of a program or library say.
type Executable struct {
	Format     string    `json:"format"` // ELF, PE or Mach-O
	Machine    string    `json:"machine"`
	Type       string    `json:"type"`
	EntryPoint string    `json:"entryPoint,omitempty"`
	Sections   []Section `json:"sections"`
	Libraries  []string  `json:"libraries"` // that it wants to be loaded with it

	mediaType string
}

// Section is a part of an executable.
type Section struct {
	Name    string  `json:"name"`
	Size    uint64  `json:"size"`
	Entropy float64 `json:"entropy"` // of what the file holds of it
}

const (
	maxSections    = 100
	maxLibraries   = 200
	maxSectionRead = 64 << 20
)

// readExecutable reads the headers of a file in one of the formats that Go knows; nil is for all others, and for those
// that only look like one.
func readExecutable(file []byte) (exe *Executable) {
	defer func() {
		// The debug packages do not promise to withstand every file that was made to harm them.
		if recover() != nil {
			exe = nil
		}
	}()
	for _, read := range []func(io.ReaderAt) (*Executable, error){readELF, readPE, readMachO, readFatMachO} {
		if exe, err := read(bytes.NewReader(file)); err == nil {
			return exe
		}
	}
	return nil
}

func readELF(r io.ReaderAt) (*Executable, error) {
	f, err := elf.NewFile(r)
	if err != nil {
		return nil, err
	}
	exe := &Executable{
		Format: "ELF", Machine: f.Machine.String(), Type: f.Type.String(),
		EntryPoint: fmt.Sprintf("%#x", f.Entry), mediaType: "application/x-elf",
	}
	for _, s := range f.Sections[:min(len(f.Sections), maxSections)] {
		if s.Type != elf.SHT_NULL && s.Type != elf.SHT_NOBITS {
			exe.addSection(s.Name, s.FileSize, s.ReaderAt)
		}
	}
	libraries, err := f.ImportedLibraries()
	exe.addLibraries(libraries, err)
	return exe, nil
}

func readPE(r io.ReaderAt) (*Executable, error) {
	f, err := pe.NewFile(r)
	if err != nil {
		return nil, err
	}
	exe := &Executable{
		Format: "PE", Machine: fmt.Sprintf("%#x", f.Machine), Type: "executable",
		mediaType: "application/vnd.microsoft.portable-executable",
	}
	if f.Characteristics&pe.IMAGE_FILE_DLL != 0 {
		exe.Type = "library"
	}
	switch header := f.OptionalHeader.(type) {
	case *pe.OptionalHeader32:
		exe.EntryPoint = fmt.Sprintf("%#x", header.AddressOfEntryPoint)
	case *pe.OptionalHeader64:
		exe.EntryPoint = fmt.Sprintf("%#x", header.AddressOfEntryPoint)
	}
	for _, s := range f.Sections[:min(len(f.Sections), maxSections)] {
		exe.addSection(s.Name, uint64(s.Size), s.ReaderAt)
	}
	libraries, err := f.ImportedLibraries()
	exe.addLibraries(libraries, err)
	return exe, nil
}

func readMachO(r io.ReaderAt) (*Executable, error) {
	f, err := macho.NewFile(r)
	if err != nil {
		return nil, err
	}
	exe := &Executable{
		Format: "Mach-O", Machine: f.Cpu.String(), Type: f.Type.String(), mediaType: "application/x-mach-binary",
	}
	for _, s := range f.Sections[:min(len(f.Sections), maxSections)] {
		exe.addSection(s.Name, s.Size, s.ReaderAt)
	}
	libraries, err := f.ImportedLibraries()
	exe.addLibraries(libraries, err)
	return exe, nil
}

// readFatMachO reads the first of the programs in a file for several machines.
func readFatMachO(r io.ReaderAt) (*Executable, error) {
	f, err := macho.NewFatFile(r)
	if err != nil {
		return nil, err
	}
	first := f.Arches[0]
	return readMachO(io.NewSectionReader(r, int64(first.Offset), int64(first.Size)))
}

// addSection measures what the file holds of a section, up to a bound: headers may claim anything.
func (e *Executable) addSection(name string, size uint64, content io.ReaderAt) {
	data, err := io.ReadAll(io.NewSectionReader(content, 0, int64(min(size, maxSectionRead))))
	if err != nil {
		data = nil
	}
	e.Sections = append(e.Sections, Section{Name: name, Size: size, Entropy: entropy(data)})
}

func (e *Executable) addLibraries(names []string, err error) {
	if err == nil {
		e.Libraries = names[:min(len(names), maxLibraries)]
	}
}
