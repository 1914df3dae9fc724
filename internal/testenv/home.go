package testenv

// Home returns environment variables that make dir the user's home for a process, in place of those that this process has.
func Home(dir string) []string {
	env := []string{"HOME=" + dir, "USERPROFILE=" + dir, "AppData=" + dir, "LocalAppData=" + dir}
	for _, name := range []string{"CONFIG", "DATA", "CACHE", "STATE"} {
		env = append(env, "XDG_"+name+"_HOME="+dir)
	}
	return env
}
